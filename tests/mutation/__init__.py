"""A sample of broken lines of the mechanism, each of which some test must notice.

``nox -s mutation`` runs it. Two well-kept tools were tried first. mutmut 3.8 leaves decorated
functions out, so everything under ``@changing``, ``@switching`` and ``@contextmanager``, and puts a
function of its own around each other one, which gift's frames and signatures show. cosmic-ray 8.7
starts a process for each mutant, a third of which change annotations. Neither drops a statement,
which is how most of the lines that nobody had noticed were broken.
"""
