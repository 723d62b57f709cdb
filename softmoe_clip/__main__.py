"""`python -m softmoe_clip`, so that `accelerate launch -m softmoe_clip` works too."""

from softmoe_clip.cli import main

main()
