"""What must survive failures, interruptions, other threads and hostile input.

Measured by `test_transactions`, ``GIFT_FAULTS=long``, on torch 2.14 and a CPU. Memory runs out at
each tensor operation of a change, once or twice in a row; a signal arrives at 500 random moments,
of which those count that were before the end. A network is corrupted if it is neither what it was
nor what the change makes of it.

============================  =============  ========
change                        out of memory  signals
============================  =============  ========
enable                        0 of 90        0 of 384
enable_pissa                  0 of 370       0 of 254
disable                       0 of 156       0 of 447
disabled                      0 of 128       0 of 468
merge                         0 of 320       0 of 204
merged                        0 of 160       0 of 494
activate                      0 of 96        0 of 469
activate_head                 0 of 72        0 of 486
activate_none                 0 of 66        0 of 500
add                           0 of 216       0 of 452
remove                        0 of 66        0 of 500
scale                         0 of 298       0 of 486
scale_active                  0 of 166       0 of 500
combine                       0 of 798       0 of 490
rows                          0 of 160       0 of 475
load_state_dict               0 of 224       0 of 499
... with assign               0 of 202       0 of 500
load_base                     0 of 776       0 of 500
load_bigger                   0 of 284       0 of 498
attach                        0 of 40        0 of 484
attach_another                0 of 58        0 of 174
step                          0 of 180       0 of 499
step_two                      0 of 212       0 of 439
detach                        0 of 58        0 of 500
go_back                       0 of 236       0 of 500
load_peft                     0 of 188       0 of 392
load_diffusers                0 of 188       0 of 440
load_kohya                    0 of 288       0 of 481
load                          0 of 1,321
load_onto_an_enabled_network  0 of 842       0 of 500
stack                         0 of 270       0 of 493
stack_from_a_file             0 of 1,976     0 of 490
disable_stacked               0 of 142       0 of 394
merge_stacked                 0 of 906       0 of 446
enable_shared                 0 of 44        0 of 491
enable_with_bias              0 of 88        0 of 432
initialise                    0 of 262
allocate                      0 of 286       0 of 500
============================  =============  ========
"""
