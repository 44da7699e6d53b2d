#!/usr/bin/env bash
# Reproduce a row of the published table: another name for `mammo reproduce`, whose --help says more.
exec "${PYTHON:-python}" -m mammo reproduce "$@"
