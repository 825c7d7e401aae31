"""Private parts of other libraries, one file for each library.

Nothing else in gift touches a name of another library that begins with an underscore. Each function
here says in its name what it asks, and in its docstring why no public name answers that. Where the
private part is missing it falls back to what is public: that may cost time or memory, or refuse in
words, but gives no other result. ``tests/test_private.py`` fails where a part is gone, tries each
fallback, and looks through gift for private names outside of this folder.

What subclasses of ``nn.Module`` use by custom stays where it is used: its dictionaries
``_parameters``, ``_buffers``, ``_modules``, ``_non_persistent_buffers_set``, ``_forward_pre_hooks``
and ``_load_state_dict_post_hooks``; its methods ``_apply``, ``_load_from_state_dict`` and
``_save_to_state_dict``, which are there to be overridden; and the ``_metadata`` of a state.
"""
