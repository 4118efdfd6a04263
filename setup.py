"""Build the distribution; everything it needs to know is in setup.cfg."""

from setuptools import setup

setup()
