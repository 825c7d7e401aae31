"""What must survive failures, interruptions, other threads and hostile input.

Measured by `test_transactions`, ``GIFT_FAULTS=long``, on torch 2.14 and a CPU. Memory runs out at
each tensor operation of a change, once or twice in a row; a signal arrives at 500 random moments,
of which those count that were before the end. A network is corrupted if it is neither what it was
nor what the change makes of it.

=================  ==============  ==============
change             out of memory   signals
=================  ==============  ==============
enable             0 of 90         0 of 384
enable_pissa       0 of 370        0 of 254
disable            0 of 156        0 of 447
disabled           0 of 128        0 of 468
merge              0 of 320        0 of 204
merged             0 of 160        0 of 494
activate           0 of 96         0 of 469
activate_head      0 of 72         0 of 486
activate_none      0 of 66         0 of 500
add                0 of 216        0 of 452
remove             0 of 66         0 of 500
scale              0 of 298        0 of 486
scale_active       0 of 166        0 of 500
combine            0 of 798        0 of 490
rows               0 of 160        0 of 475
load_state_dict    0 of 224        0 of 499
... with assign    0 of 202        0 of 500
load_base          0 of 776        0 of 500
load_bigger        0 of 284        0 of 498
attach             0 of 40         0 of 484
attach_another     0 of 58         0 of 174
step               0 of 180        0 of 499
allocate                           0 of 500
=================  ==============  ==============
"""
