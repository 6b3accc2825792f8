"""Bytes under keys: a folder, a bucket or a web server, and the checked way from them to arrays."""
