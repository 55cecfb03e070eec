"""The machine finds the schedule: simulate, search, measure, and choose while serving."""
