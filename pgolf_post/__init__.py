"""pgolf-post: checkpoint-centric post-training for Parameter Golf."""
