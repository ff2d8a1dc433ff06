# SPDX-License-Identifier: Apache-2.0
"""Tools beside the recogniser; run from the project root: python -m tools.<name>."""
