"""All that talks to a scheduler: profiles, jobs, submission."""
