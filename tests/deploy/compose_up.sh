#!/usr/bin/env bash
# Bring the fleet up in containers, train and serve, restart each container in turn, take everything down and
# up again, and see that nothing was lost. Ends with what it has made removed.
#
#   tests/deploy/compose_up.sh                              docker compose
#   COMPOSE="WRAPPER ." UP="up -d" tests/deploy/compose_up.sh    a stand-in for it, podman's for one
#
# It needs free ports 18000 and 18001 on loopback (PORT, GRPC_PORT) and PYTHON with this project's packages.
set -euo pipefail
cd "$(dirname "$0")/../.."

secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

COMPOSE=${COMPOSE:-docker compose}
export UP=${UP:-up -d --build --wait}
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-lorafleet-check}
export COMPOSE_PROFILES=cpu
export PORT=${PORT:-18000} GRPC_PORT=${GRPC_PORT:-18001}
export TRAINER_THREADS=${TRAINER_THREADS:-1} INFERENCE_THREADS=${INFERENCE_THREADS:-1}
# The environment goes before .env, so that a person's own fleet is neither met nor needed.
export STORE_ACCESS_KEY=lorafleet STORE_SECRET_KEY REDIS_PASSWORD KEY_PEPPER GRAFANA_PASSWORD
STORE_SECRET_KEY=$(secret) REDIS_PASSWORD=$(secret) KEY_PEPPER=$(secret) GRAFANA_PASSWORD=$(secret)
unset STORE_URL OTLP_ENDPOINT

# What failed is of use only with what the containers said.
trap 'status=$?; [ $status = 0 ] || $COMPOSE logs --tail 60 || true; $COMPOSE down -v; exit $status' EXIT
$COMPOSE $UP
echo "$(date +%T) built and up after $SECONDS s"
"${PYTHON:-.venv/bin/python}" -m tests.deploy.compose_check --compose "$COMPOSE" --up "$UP"
