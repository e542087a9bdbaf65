#!/usr/bin/env bash
# tpu/logs.sh [--worker N|all] [--lines N] [--follow]: prints the training's log.
#
# The default is worker 0, which reports for all; the other workers' logs hold their own errors.

# shellcheck source=tpu/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
begin "$@"
worker=0 lines=50 follow=''
set -- ${REST[@]+"${REST[@]}"}
while (($#)); do
  case $1 in
    --follow) follow=-F ;;
    --worker | --lines)
      option=$1 value=${2-}
      [[ $value =~ ^[0-9]+$ || "$option $value" == '--worker all' ]] || fail "$option ${value:-(nothing)}: expected a number"
      if [[ $option == --worker ]]; then worker=$value; else lines=$value; fi
      shift
      ;;
    *) fail "$1: unexpected; --help lists the options" ;;
  esac
  shift
done
on_workers "tail -n $lines ${follow:+$follow }$REMOTE/train.log" "$worker"
