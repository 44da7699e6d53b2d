#!/usr/bin/env bash
# Finetune whole-image models with few patients: another name for `mammo subset`, whose --help says more.
exec "${PYTHON:-python}" -m mammo subset "$@"
