"""`python -m pgolf_post` is `pgolf-post`."""

from pgolf_post.cli import main

main()
