"""The training method: phases, the consistency step, losses, stages and the discriminator."""
