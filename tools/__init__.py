# SPDX-License-Identifier: Apache-2.0
"""Tools beside the recogniser, run from the project's root: python -m tools.<name>."""
