"""A profile: which loads are measured, how they are measured, and what their times and energies are in between."""
