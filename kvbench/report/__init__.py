"""From records to curves, critical footprints, tables, pictures and a page."""
