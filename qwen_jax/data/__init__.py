# SPDX-License-Identifier: Apache-2.0
"""Documents -> packed token rows on the mesh.

Read in the order the data flows: `source` (files to documents), `tokenizer` (text to
ids), `mixture` (which document comes next), `packing` (ids to rows), `loader` (all of
it as one iterator with exact state), `preview` (a look at the result). Importing this
package alone imports nothing heavy.
"""
