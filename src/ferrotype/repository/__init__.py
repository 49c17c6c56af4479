"""Snapshots of deduplicated chunks over one object store.

keys        passphrases and key files open slots that hold the master key
sealing     chunk ids, and the frames chunks are stored in: compressed, encrypted, proven on the way back
packs       many frames in one object
index       chunk id -> (pack, offset, length)
chunkmap    disk offset -> chunk id, as a tree of pages that are chunks themselves
snapshots   what was backed up when, and the roots of its maps
store       all of it together: open, read chunks, write chunks, commit
source      a disk of a snapshot as a Source
"""
