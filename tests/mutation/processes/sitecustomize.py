"""What Python loads first in each process that a test of the mutation lane starts."""

from tests.mutation.started import begin

begin()
