"""A stand-in for CVAT 2.73: real HTTP on a loopback port, state in memory, the endpoints that SSCloud and cvat-sdk use.

    def test_fetches(cvat_server: CvatStandin) -> None:             # a stand-in, started and empty
        site = cvat_server.site
        with site.client() as client:                               # the real cvat-sdk, logged in
            project = site.make_project(client, "Улица", [{"name": "Земля", "color": "#00ff00", "type": "any"}])
            task = make_task(client, project.id, {"a/1.jpg": jpeg, "2.png": png}, segment_size=1)
            ids = label_ids(client, project.id)                     # {"Земля": 1}
            first, second = jobs_of(client, task.id)                # job ids by start frame
            add_shapes(client, first, [polygon(ids["Земля"], 0, [1, 1, 9, 1, 9, 9]), mask(ids["Земля"], 0, bitmap)])
            set_state(client, first, state="completed")
        subprocess.run([...], env={**os.environ, **site.environment()})

Tests that should also pass on a live server take `cvat_site: Site` instead of `cvat_server`: it comes once for the
stand-in and, with `pytest -m live`, once for the server in CVAT_URL, CVAT_USERNAME and CVAT_PASSWORD. Everything in
`site.py` works on both. Projects made by `site.make_project` (others: `site.projects.append(id)`) are deleted
afterwards.

A `CvatStandin` is also the control of the server. Settings, to be changed at any time:

    server.url, server.site, server.access_token      Bearer token; login by server.site.username, .password
    server.version = "2.73.0"                         what /api/server/about says
    server.page_size = 10; server.largest_page = 500  results a page; the most that a request's page_size gets
    server.polls_until_done = 1                       polls that a background request answers "queued" or "started"
    server.chunk_size = 36                            frames a chunk, for tasks that do not say
    server.nuclio_url = "http://127.0.0.1:8070"       Nuclio dashboard to take functions from (`sscloud serve FOLDER`)
    server.dashboard_timeout = 30.0                   seconds per frame

What people and other programs do behind the back of a test:

    server.shapes(job_id)                             the stored shapes, as the API lists them (copies)
    server.set_shape_order(job_id, [7, 5, 6])         order in which the API lists a job's shapes (by id)
    server.edit_shape(shape_id, points=…, label_id=…) a person's edit: any field, dates move on; `source` stays
    server.make_replicas(job_id, 2)                   consensus replicas of an annotation job → their ids
    server.set_job(job_id, state=…, stage=…)          as a person would
    server.store.users[2] = "anna"                    another user, who can be given jobs
    server.store.issues                               issues that are pinned to frames, with their comments
    server.add_organization("slug")                   organisations; X-Organization and org= are then checked
    server.add_export("project", 7, "LabelMe 3.0", b"…zip…")   what exports of this format download
    server.add_function(Function(id="unet", labels=[…], handler=call))    a function in memory: handler(image, payload)
                                                      → list of results as Nuclio functions send them; or it raises
                                                      (version="latest" or description=None: the list answers 500)
    server.rename_frame(task_id, 0, "../../evil.jpg") names that no upload would get through
    server.replace_frame(task_id, 0, data)            other bytes for a frame

Webhooks are told of changed states and stages of jobs (event update:job), signed as CVAT signs:

    server.deliveries.wait(); server.deliveries.done  what was sent: event, body, status of the answer

Faults and the log:

    server.fail("GET", r"/api/(jobs|tasks)/\\d+/data/?$", Drop(after=100), times=2, skip=1)   # lets the first one pass
    server.fail("GET", r"/api/jobs$", Status(503), times=None)        # None: for ever, until server.heal()
    Drop(after=N)              N bytes of the body (headers and Content-Length are right), then the connection closes;
                               after=None: it is reset before any reply
    Status(429, retry_after=2) an error reply; 502, 503, 504 come with nginx' HTML, others with JSON
    Slow(seconds=0.1, bytes=1000)   a pause before each piece of the body
    Body(b"<html>…")           status 200 and this body instead of the right one: wrong JSON
    Truncated(bytes=20)        the first bytes of the right body with a Content-Length to match: broken JSON
    A fault strikes after the server did its work: a write is stored although the reply is lost. With before=True it
    strikes instead of it: nothing is stored.

    server.log                 list[Logged]: method, path, query, status, time, headers (no credentials), body
    server.count("GET", r"/data/?$", type="frame")     how many requests of the log match, by query too
    server.find(…)             those requests themselves
    server.forget()            empties the log

By hand: `python -m cvat_standin --port 8080` in the checkout.
"""

from cvat_standin.faults import Body, Drop, Fault, Logged, Slow, Status, Truncated
from cvat_standin.lambdas import Function
from cvat_standin.server import CvatStandin
from cvat_standin.site import (
    Site,
    add_shapes,
    job_shapes,
    jobs_of,
    label_ids,
    make_ground_truth,
    make_task,
    mask,
    polygon,
    set_state,
)

__all__ = [
    "Body",
    "CvatStandin",
    "Drop",
    "Fault",
    "Function",
    "Logged",
    "Site",
    "Slow",
    "Status",
    "Truncated",
    "add_shapes",
    "job_shapes",
    "jobs_of",
    "label_ids",
    "make_ground_truth",
    "make_task",
    "mask",
    "polygon",
    "set_state",
]
