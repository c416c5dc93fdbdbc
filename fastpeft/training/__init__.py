"""One run: its configuration, its Trainer, its folder, and what is done with it once it is finished."""
