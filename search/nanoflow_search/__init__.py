"""The search that writes schedule files: profile, two-stage MILP, timing on the device."""
