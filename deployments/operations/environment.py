"""What Ray's processes are told by environment variables, on one machine and on a cluster.

They must be set before Ray is imported; its processes inherit them. The chart is generated from here.
"""

from __future__ import annotations

# Of every process. What the user has set already stays.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Replicas share the cores; threads that spin while they wait would take them from each other.
    "OMP_WAIT_POLICY": "PASSIVE",
    # numpy multiplies small matrices only, and its threads spin on after each of them: a verdict on a picture cost half
    # as much again.
    "OPENBLAS_NUM_THREADS": "1",
    # Each thread that allocates would get an arena of its own, which gives little back.
    "MALLOC_ARENA_MAX": "2",
    # Ray's workers are nice (15) by default, for batch jobs beside a user. Whatever else ran would starve a server.
    "RAY_worker_niceness": "0",
    # On a cluster idle workers would be started and never used.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # A start on a busy machine is slow, not wrong.
    "SERVE_SLOW_STARTUP_WARNING_S": "600",
    # Libraries that fork would have gRPC write a line for each fork.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A forward on all cores waits for whatever takes one of them from it. Serve's controller, ten times a second by
    # default, took 2.4% of a core of an idle server, more than any other process; nobody reads Serve's own metrics.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    # A replica that failed three health checks does not come back, and is not asked to finish what it cannot.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # Ray keeps what its processes print in files, without a bound unless told.
    "RAY_ROTATION_MAX_BYTES": str(16 * 1024 * 1024),
    "RAY_ROTATION_BACKUP_COUNT": "1",
}
# Seconds that Ray's processes may wait for each other. A start on a busy machine is slow, not wrong; the command itself
# sees when one of them has died.
_PATIENCE_S = 600
# Of a machine that is a cluster of its own.
ONE_MACHINE = {
    # Here they are used: they start while Serve's controller does, one core of a small machine being idle then.
    "RAY_prestart_worker_first_driver": "1",
    # How often Ray's agent looks at every process, for a dashboard that is not there.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # No Ray port outward. Ray's own switch for "loopback only", whatever its name says.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # The command for Ray's node to register; it waits for the agents, which are slow to import.
    "RAY_raylet_start_wait_time_s": str(_PATIENCE_S),
    "RAY_gcs_server_port_wait_time_s": str(_PATIENCE_S),
    "RAY_NUM_REDIS_GET_RETRIES": str(_PATIENCE_S),
    # The node for its agents and workers.
    "RAY_agent_register_timeout_ms": str(_PATIENCE_S * 1000),
    "RAY_worker_register_timeout_seconds": str(_PATIENCE_S),
    # For connections between processes: attempts of a second, or seconds in all.
    "RAY_raylet_client_num_connect_attempts": str(_PATIENCE_S),
    "RAY_gcs_rpc_server_connect_timeout_s": str(_PATIENCE_S),
    "RAY_py_gcs_connect_timeout_s": str(_PATIENCE_S),
    "RAY_gcs_server_request_timeout_seconds": str(_PATIENCE_S),
    # Ray asks its node every few seconds how it is, and would end it for five late answers. There is no other node.
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "10",
}
# What keeps a Ray private; nobody's environment changes it. The other RAY_* variables that this file does not name are
# taken out of its environment: they are meant for another Ray.
PRIVATE = {
    # It would start its workers by `uv run` too, and upload the working directory to them.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Who has no token cannot submit work, another user of this machine included. RAY_AUTH_TOKEN is made at each start.
    "RAY_AUTH_MODE": "token",
}
# Of processes that hold replicas. They save hops between threads on the way of a message. A process without an
# event loop needs its router in a thread, so the command sets them once Ray Serve is imported.
REPLICA_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
