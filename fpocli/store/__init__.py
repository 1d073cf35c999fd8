"""The store, as docs/format.md defines it. The only room that imports zarr."""
