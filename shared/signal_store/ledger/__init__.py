"""What has been decided and finished: documents that are created once, and the seal over them."""
