#!/usr/bin/env bash
# What the platform runs in the image. `exec`: a signal to the container reaches Python itself.
exec python3 -m ymir_adapter
