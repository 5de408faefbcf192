"""A stand-in for nuctl and docker: records how it is called, and runs functions.

    python nuclio_programs.py FOLDER nuctl|docker ARGUMENT…
    python nuclio_programs.py FOLDER answer PORT

A function folder with a file `answer.json` ([status, body]) is run by the second form: it answers that, at once. Any
other is run by `sscloud serve`.

FOLDER holds `state.json`: what Nuclio and Docker have, and what is to go wrong; and `calls.jsonl`: every call.
nuctl takes the flags of Nuclio's sources (pkg/nuctl/command) and no others.
"""

import argparse
import base64
import contextlib
import http.client
import http.server
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main(folder: Path, program: str, arguments: list[str]) -> int:
    if program == "answer":
        return answer(folder, int(arguments[0]))
    with (folder / "calls.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps([program, *arguments]) + "\n")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    try:
        return nuctl(state, arguments) if program == "nuctl" else docker(state, arguments)
    finally:
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


def nuctl(state: dict[str, Any], arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="nuctl", allow_abbrev=False)
    for flag in ("--platform", "--namespace"):
        parser.add_argument(flag, required=True)
    verbs = parser.add_subparsers(dest="verb", required=True)
    get = verbs.add_parser("get", allow_abbrev=False)
    get.add_argument("what", choices=("functions", "projects"))
    get.add_argument("name")
    get.add_argument("--output")
    create = verbs.add_parser("create")
    create.add_argument("what", choices=("project",))
    create.add_argument("name")
    deploy = verbs.add_parser("deploy", allow_abbrev=False)
    deploy.add_argument("name", nargs="?")
    for flag in ("--project-name", "--path", "--file", "--image", "--triggers", "--platform-config", "--registry"):
        deploy.add_argument(flag)
    invoke = verbs.add_parser("invoke", allow_abbrev=False)
    invoke.add_argument("name")
    for flag in ("--method", "--content-type", "--log-level", "--timeout"):
        invoke.add_argument(flag)
    invoke.add_argument("--raise-on-status", action="store_true")
    # Cobra takes the flags of the root anywhere; argparse before the verb only.
    args = parser.parse_args([*arguments[-4:], *arguments[:-4]])
    if args.verb == "get" and args.what == "projects":
        return 0 if args.name in state["projects"] else not_found("No projects found")
    if args.verb == "get":
        return show(state, args.name)
    if args.verb == "create":
        state["projects"].append(args.name)
        return 0
    return start(state, args) if args.verb == "deploy" else ask(state)


def not_found(text: str) -> int:
    print(text, end="")
    return 1


def show(state: dict[str, Any], name: str) -> int:
    if state.get("get") == "broken" or state.get("failing_gets", 0) > 0:
        state["failing_gets"] = state.get("failing_gets", 0) - 1
        print("Failed to create a Docker client", file=sys.stderr)
        return 1
    function = state["functions"].get(name)
    if function is None:
        return not_found("No functions found")
    print("26.11.23 10:00:00.000 (I) nuctl Some line of the log")
    print(json.dumps(function, indent=4))
    return 0


def start(state: dict[str, Any], args: argparse.Namespace) -> int:
    import yaml  # the other calls do without, and start in a tenth of the time

    config = yaml.safe_load(Path(args.file).read_text(encoding="utf-8"))
    metadata, spec = config["metadata"], config["spec"]
    metadata["namespace"] = args.namespace
    if args.project_name not in state["projects"]:
        print("Project does not exist", file=sys.stderr)
        return 1
    if args.triggers:
        spec["triggers"] = {**spec["triggers"], **json.loads(args.triggers)}
    if args.platform_config:
        spec["platform"]["attributes"].update(json.loads(args.platform_config)["attributes"])
    function = {"metadata": metadata, "spec": spec, "status": {"state": "building"}}
    name = metadata["name"]
    back = spec["build"].get("mode") == "neverBuild"
    print(f"nuctl Deploying function {name}", flush=True)
    if back and name not in state["functions"]:
        print("Non existing function cannot be created with neverBuild mode", file=sys.stderr)
        return 1
    fault = state.get("back" if back else "fault")
    if not back:
        function["status"] = {"state": "error", "message": "Failed to build processor image"}
        state["functions"][name] = function
        if fault == "build":
            print("nuctl Failed to build processor image: no space left on device", file=sys.stderr)
            return 1
        spec["image"] = args.image or spec["build"]["image"] + ":latest"
        state["images"][spec["image"]] = args.path
    stop(state, name)
    if fault == "hang":
        (Path(args.path) / "hanging").touch()
        time.sleep(100)
    if fault == "start":
        function["status"] = {"state": "error", "message": "Function wasn't ready in time"}
        state["functions"][name] = function
        print("nuctl Function wasn't ready in time", file=sys.stderr)
        return 1
    trigger = next(trigger for trigger in spec["triggers"].values() if trigger["kind"] == "http")
    port = 0 if fault == "port" else trigger["attributes"].get("port", 0)
    state["functions"][name] = function
    pid, port = serve(Path(state["images"][spec["image"]]), port)
    state["containers"][f"nuclio-{args.namespace}-{name}"] = [port, pid]
    function["status"] = {"state": "unhealthy" if fault == "unhealthy" else "ready", "httpPort": port}
    state["failing_gets"] = 0 if back else state.get("failing_gets_after", 0)
    return 0


def stop(state: dict[str, Any], name: str) -> None:
    for container, (_, pid) in list(state["containers"].items()):
        if container.endswith(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            while alive(pid):
                time.sleep(0.02)
            del state["containers"][container]


def alive(pid: int) -> bool:
    """Whether a process, no child of ours, still runs; one that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
    except (ProcessLookupError, FileNotFoundError):
        return False


def serve(folder: Path, port: int) -> tuple[int, int]:
    command = [sys.executable, "-m", "tools.cli", "serve", str(folder), "--port", "0", "--function-port", str(port)]
    if (folder / "answer.json").is_file():
        command = [sys.executable, "-S", "-E", __file__, str(folder), "answer", str(port)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[:1] == ["function"]:
            port = int(line.split()[1].split(":")[2].split("/")[0])
        if "Ctrl-C" in line:
            return process.pid, port
    raise SystemExit(f"the function ended with status {process.wait()}")


def answer(folder: Path, port: int) -> int:
    status, body = json.loads((folder / "answer.json").read_text(encoding="utf-8"))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Metrics, of those who have any."""
            metrics = folder / "metrics.txt"
            self.send_response(200 if metrics.is_file() else 404)
            self.end_headers()
            if metrics.is_file():
                self.wfile.write(metrics.read_bytes())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"function  http://127.0.0.1:{server.server_address[1]}/\nCtrl-C stops it.", flush=True)
        server.serve_forever()
    return 0


def ask(state: dict[str, Any]) -> int:
    if state.get("cluster") == "closed":
        print("Error - Function has no external invocation url", file=sys.stderr)
        return 1
    port = next(iter(state["containers"].values()))[0]
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/", sys.stdin.buffer.read(), {"Content-Type": "application/json"})
        response = connection.getresponse()
        body = json.loads(response.read())
    print("\n> Response headers:\nContent-Type = application/json\n\n> Response body:")
    print(json.dumps(body, indent=4))
    if response.status != 200:
        print("Error - Function invocation failed", file=sys.stderr)
        return 1
    return 0


def docker(state: dict[str, Any], arguments: list[str]) -> int:
    match arguments:
        case ["info", "--format", _]:
            if state.get("docker") == "down":
                print("Cannot connect to the Docker daemon. Is the docker daemon running?", file=sys.stderr)
                return 1
            print("28.2.2")
        case ["network", "inspect", "--format", _, name]:
            if name not in state["networks"]:
                print(f"Error response from daemon: network {name} not found", file=sys.stderr)
                return 1
            print(name)
        case ["ps", "--filter", published, "--format", "{{.Names}}"]:
            port = int(published.removeprefix("publish="))
            print("\n".join(name for name, (held, _) in state["containers"].items() if held == port))
        case ["run", "--rm", "--gpus", "all", _, "nvidia-smi", "-L"]:
            if state.get("gpu") != "there":
                print('could not select device driver "" with capabilities: [[gpu]].', file=sys.stderr)
                return 125
            print("GPU 0: NVIDIA H200 (UUID: GPU-1)")
        case ["exec", "-i", "nuclio-local-storage-reader", *command]:
            return store(state, command)
        case _:
            print(f"docker: unexpected {arguments}", file=sys.stderr)
            return 125
    return 0


def store(state: dict[str, Any], command: list[str]) -> int:
    """Commands in the container through which Nuclio reads and writes its functions' files."""
    if state.get("store") == "elsewhere":
        print("Error response from daemon: No such container: nuclio-local-storage-reader", file=sys.stderr)
        return 1
    folder = "/etc/nuclio/store/functions/nuclio/"
    match command:
        case ["cat", path]:
            function = state["functions"][path.removeprefix(folder).removesuffix(".json")]
            row = "something else" if state.get("store") == "changed" else json.dumps(function)
            print(base64.b64encode(row.encode()).decode())
        case ["sh", "-c", 'cat > "$1" && mv "$1" "$2"', "sh", hidden, path]:
            name = path.removeprefix(folder).removesuffix(".json")
            assert hidden == f"{folder}.{name}.json", "Nuclio lists every file but hidden ones"
            if state.get("store") != "lost":
                state["functions"][name] = json.loads(base64.b64decode(sys.stdin.read(), validate=False))
        case _:
            print(f"docker exec: unexpected {command}", file=sys.stderr)
            return 127
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
