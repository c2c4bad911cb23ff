"""Ranks in a Spark barrier stage: launching them, letting them meet, hearing from them.

Imports nothing at the top level, so that the parts that know nothing of Spark load without it.
"""
