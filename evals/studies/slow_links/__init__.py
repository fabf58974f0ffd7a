"""Recovery over slow links: gradients compressed at every step, or local steps between averages.

Two workers recover a pruned model. For a time (and a rate of the link between them), or for a
number of bytes, every method takes as many steps as it can, with a schedule made for this number,
and the loss on held-out rows is compared. What a step computes and what an exchange takes is
measured on emulated links; a step's loss does not depend on the link, so it is trained without one.
"""
