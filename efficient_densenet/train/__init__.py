"""The training command: ``python -m efficient_densenet.train``, ``efficient-densenet-train``.

:mod:`.command` is the way from arguments to an exit status, :mod:`.loop` the training itself. What
a run does is described by :class:`.options.Options` alone, so that ``demo.py``, with other names
for its options, is the same program.

Every random number of a run is a function of its seed and of where it is needed (the epoch, the
image, the step, the process), never of what was drawn before. That is what makes an interrupted run
go on with the same bits: there is no state of a generator to save.
"""
