# SPDX-License-Identifier: Apache-2.0
"""Parameters <-> disk: atomic asynchronous checkpoints that prove they are intact.

Start in `manager.py`. This package sees a pytree of arrays and a path, never a training
state class, and imports only the ground of the project.

  manager.py     save, wait, check, restore; retention; fallback to an intact step
  arrays.py      Orbax: named arrays -> files -> arrays on any mesh
  manifest.py    sizes and digests of a step's files: the mark that makes it count
  digests.py     the files of a save, digested by all processes together
  saving.py      one save: prepare, write, vote, commit, retain
  catalog.py     which steps are good, and what is wrong with the others
  steps.py       names of step folders, atomic commit, deletion, leftovers, retention
  agree.py       small texts exchanged between the processes of one run
  timing.py      when a time has passed: the same step in all processes
  lock.py        one writer per run folder; is the folder writable at all
  compatible.py  which config changes a resumed run may make

Raises: config.InputError for what the user can mend, manager.SaveError for a save that
did not succeed.
"""
