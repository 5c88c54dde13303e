"""`dia-fast serve`: an HTTP server that speaks the OpenAI speech protocol, with a page for the browser.

`options` has what the operator chooses, `app` the routes, `schemas` and `errors` what goes over the wire, `service` the
loaded model with its queue, `driver` the thread that owns the engine, `speech` one utterance on its way, `encoders`
the audio formats, `voices` the names that requests may use, `guard` what every request passes first, `metrics` and
`run` what operators see. Sampling, long-form speech and the codec live elsewhere in the package.

Needs the extra `server`. Nothing in the package but the command line imports it.
"""
