# SPDX-License-Identifier: Apache-2.0
"""What a run does when it is told to stop or something breaks.

  signals.py   SIGTERM, Ctrl-C and internal stop requests -> one agreed last step

Imports only the ground of the project.
"""
