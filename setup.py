"""The one part that is compiled: without a compiler mimscale installs and works, and reads crops more slowly."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "mimscale.store._chunks", ["mimscale/store/_chunks.c"], depends=["mimscale/store/_guard.h"], optional=True
        )
    ]
)
