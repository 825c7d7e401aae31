"""What must survive failures, interruptions, other threads and hostile input.

Measured by `test_transactions`, ``GIFT_FAULTS=long``, on torch 2.14 and a CPU: memory runs out at
each tensor operation of a change, once or twice in a row. A network is corrupted if it is neither
what it was nor what the change makes of it.

==================  ==================
change              corrupted
==================  ==================
enable              0 of 90
enable_pissa        0 of 370
disable, disabled   0 of 156, 0 of 128
merge, merged       0 of 320, 0 of 160
activate            0 of 96
activate_head       0 of 72
activate_none       0 of 66
add, remove         0 of 216, 0 of 66
scale               0 of 298
scale_active        0 of 166
==================  ==================

A signal at 500 random moments of each change, by the same test; counted are those that arrived
before it was over:

==================  ==================
change              corrupted
==================  ==================
enable              0 of 328
enable_pissa        0 of 491
disable, disabled   0 of 210, 0 of 453
merge, merged       0 of 261, 0 of 496
activate            0 of 392
activate_head       0 of 273
activate_none       0 of 472
add, remove         0 of 411, 0 of 494
==================  ==================
"""
