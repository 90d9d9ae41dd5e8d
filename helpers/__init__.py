"""Plumbing of the tutorial: one module a step, in the order of the story."""

from helpers import home

home.provide()
