"""What a cache looks like on disk: its manifest, and the arrays that follow from it."""
