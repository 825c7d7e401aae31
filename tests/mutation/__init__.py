"""A sample of broken lines of the mechanism, each of which some test must notice.

``nox -s mutation`` runs it. Two well-kept tools were tried first. mutmut 3.8 leaves decorated
functions out, so everything under ``@changing``, ``@switching`` and ``@contextmanager``, and puts a
function of its own around each other one, which gift's frames and signatures show. cosmic-ray 8.7
starts a process for each mutant, a third of which change annotations. Neither drops a statement,
which is how most of the lines that nobody had noticed were broken.

Measured (torch 2.14.1). A sample says how many of all mutants were noticed as long as no test was
written for it:

* ``120 --seed 0``, the sample of the lane: 100 noticed of 111 that change something, 90 %. The
  other eleven have a test since, and each was tried with its broken line. Of the nine that change
  nothing one line is gone, one has the name of another mutant (`changes.py:105`: equal values are
  added), and the others are listed.
* Before that the lane looked at three variants of a parametrised test at most, so of a table with a
  hundred rows it knew three, and the numbers of the first samples are too low. ``90 --seed 5``: 59
  of 81, 73 %. Of the other 22 six had no test once all variants and the tests that were written in
  the meantime counted; they have one since. ``80 --seed 3``: 57 of 75, 76 %; the first 63 of ``100
  --seed 2``: 42; the first 34 of ``60 --seed 1``: 22. Their survivors have tests, too.
"""
