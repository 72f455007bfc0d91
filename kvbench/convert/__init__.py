"""Task files from HELMET and LongProc, made by those projects' own loaders."""
