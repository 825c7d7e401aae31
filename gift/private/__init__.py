"""Private parts of other libraries: one file per library, a folder for torch.

Nothing else in gift touches a name of another library that begins with an underscore. The name of
each function here says what it finds out, and its docstring says why no public name does. If the
private part is missing, the function falls back to public names. That may cost time or memory, or
raise a clear error, but never gives another result. ``tests/test_private.py`` fails if a part is
gone, tests each fallback, and searches gift for private names outside of this folder.

Names that subclasses of ``nn.Module`` use by convention stay where they are used: the dictionaries
``_parameters``, ``_buffers``, ``_modules``, ``_non_persistent_buffers_set``, ``_forward_pre_hooks``
and ``_load_state_dict_post_hooks``; the methods ``_apply``, ``_load_from_state_dict`` and
``_save_to_state_dict``, which are meant to be overridden; and the ``_metadata`` of a state.
"""
