"""Mechanisms that know no model: progress, atomic files, ranks, threads, compiled loops, resumable work."""
