#!/bin/sh
# A load test at growing load with perf_analyzer over gRPC streams, then its report:
#
#   perf_analyzer_configs/sweep.sh concurrency INPUTS.json RESULTS     LEVELS clients, each sends when its last is done
#   perf_analyzer_configs/sweep.sh poisson INPUTS.json RESULTS         LEVELS requests/s, at random moments
#   perf_analyzer_configs/sweep.sh periodic INPUTS.json RESULTS        RAMP=start:end:step clients; a step is added
#                                                                      whenever each has had REQUEST_PERIOD responses
# RESULTS is a folder that does not exist yet. Settings, as environment variables, with their defaults:
set -eu
URL=${URL:-localhost:8001}
MODEL=${MODEL:-nanoflow}
SLO=${SLO:-$(dirname "$0")/slo/chat.json}
LEVELS=${LEVELS:-1 2 4 8 16 32}
REQUESTS=${REQUESTS:-20}              # a client (concurrency), or so many seconds' worth of them (poisson)
RAMP=${RAMP:-4:32:4}
REQUEST_PERIOD=${REQUEST_PERIOD:-16}
PYTHON=${PYTHON:-.venv/bin/python}
PERF_ANALYZER=${PERF_ANALYZER:-.venv/bin/perf_analyzer}

[ $# = 3 ] || { sed '1d; /^set /d; /^\[/,$d; s/^# \{0,1\}//' "$0" >&2; exit 2; }
mode=$1 inputs=$2 results=$3
case $mode in concurrency | poisson | periodic) ;; *) echo "sweep.sh: unknown mode $mode" >&2; exit 2 ;; esac
mkdir -p "$(dirname "$results")"
mkdir "$results" "$results/exports"

# run NAME OPTION...: one experiment; its requests go to exports/NAME.json.
run() {
    name=$1
    shift
    echo "$name ..."
    "$PERF_ANALYZER" -m "$MODEL" -u "$URL" -i grpc --async --streaming --input-data "$inputs" "$@" \
        --profile-export-file "$results/exports/$name.json" >"$results/exports/$name.log" 2>&1 ||
        { cat "$results/exports/$name.log" >&2; exit 1; }
}

case $mode in
concurrency)
    for level in $LEVELS; do
        run "concurrency_$level" --concurrency-range "$level" --request-count $((level * REQUESTS))
    done ;;
poisson)
    for level in $LEVELS; do
        run "poisson_$level" --request-rate-range "$level" --request-distribution poisson \
            --request-count $((level * REQUESTS))
    done ;;
periodic)
    run periodic --periodic-concurrency-range "$RAMP" --request-period "$REQUEST_PERIOD" ;;
esac
"$PYTHON" "$(dirname "$0")/report.py" "$results"/exports/*.json --slo "$SLO" --output "$results/report"
