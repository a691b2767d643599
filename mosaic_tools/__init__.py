# SPDX-License-Identifier: Apache-2.0
"""What the commands share; none of it is part of a model's folder."""
