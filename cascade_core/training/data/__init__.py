"""Pictures, captions and masks on disk, and the batches that are made of them."""
