"""Recovery of pruned models: what it is learnt from, from where, and which parameters.

A cell is one recovery: a model, a pruning_ratio, an arm (`cells.ARMS`) and a seed. All cells of a
model take equally many steps over the same rows in the same order (by seed), so that arms are
compared at equal steps and equal data. Each arm has the learning rate that a search on validation
data found for it; the test is only measured at the end.
"""
