#!/bin/sh
# A load test at growing load with perf_analyzer over gRPC streams, then its report:
#
#   perf_analyzer_configs/sweep.sh concurrency INPUTS.json RESULTS     LEVELS clients, each sends when its last is done
#   perf_analyzer_configs/sweep.sh poisson INPUTS.json RESULTS         LEVELS requests/s, at random moments
#   perf_analyzer_configs/sweep.sh periodic INPUTS.json RESULTS        RAMP=start:end:step clients; a step is added
#                                                                      whenever each has had REQUEST_PERIOD responses
# RESULTS is a folder that does not exist yet. Settings, as environment variables, with their defaults:
set -eu
configs=$(dirname "$0")
URL=${URL:-localhost:8001}
MODEL=${MODEL:-nanoflow}
SLO=${SLO:-$configs/slo/chat.json}
LEVELS=${LEVELS:-1 2 4 8 16 32}
REQUESTS=${REQUESTS:-20}              # a client (concurrency), or so many seconds' worth of them (poisson)
RAMP=${RAMP:-4:32:4}
REQUEST_PERIOD=${REQUEST_PERIOD:-16}
ATTEMPTS=${ATTEMPTS:-5}                # at an experiment whose results perf_analyzer loses
PYTHON=${PYTHON:-.venv/bin/python}
PERF_ANALYZER=${PERF_ANALYZER:-.venv/bin/perf_analyzer}

[ $# = 3 ] || { sed '1d; /^set /d; /^\[/,$d; s/^# \{0,1\}//' "$0" >&2; exit 2; }
mode=$1 inputs=$2 results=$3
case $mode in concurrency | poisson | periodic) ;; *) echo "sweep.sh: unknown mode $mode" >&2; exit 2 ;; esac
mkdir -p "$(dirname "$results")"
mkdir "$results" "$results/exports"

# run NAME REQUESTS OPTION...: one experiment; its requests, REQUESTS or more, go to exports/NAME.json.
run() {
    name=$1 requests=$2 export=$results/exports/$1.json log=$results/exports/$1.log
    shift 2
    for attempt in $(seq "$ATTEMPTS"); do
        echo "$name ..."
        rm -f "$export" # perf_analyzer refuses one that exists
        status=0
        "$PERF_ANALYZER" -m "$MODEL" -u "$URL" -i grpc --async --streaming --input-data "$inputs" "$@" \
            --profile-export-file "$export" >"$log" 2>&1 || status=$?
        if [ $status != 0 ]; then
            cat "$log" >&2
            [ $status -gt 128 ] || exit 1 # what it reports itself would only come again
            fault="ended by signal $((status - 128))"
        elif fault=$("$PYTHON" "$configs/whole.py" "$export" "$requests" 2>&1); then
            return
        fi
        echo "sweep.sh: $name, attempt $attempt of $ATTEMPTS: perf_analyzer lost its results" \
            "($configs/README.md, Lost results): $fault" >&2
    done
    exit 1
}

case $mode in
concurrency)
    for level in $LEVELS; do
        run "concurrency_$level" $((level * REQUESTS)) --concurrency-range "$level" --request-count $((level * REQUESTS))
    done ;;
poisson)
    for level in $LEVELS; do
        run "poisson_$level" $((level * REQUESTS)) --request-rate-range "$level" --request-distribution poisson \
            --request-count $((level * REQUESTS))
    done ;;
periodic)
    until=${RAMP#*:}
    run periodic "${until%%:*}" --periodic-concurrency-range "$RAMP" --request-period "$REQUEST_PERIOD" ;;
esac
"$PYTHON" "$configs/report.py" "$results"/exports/*.json --slo "$SLO" --output "$results/report"
