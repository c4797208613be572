-- Posts {"user_id": …} for one user after another, and prints what wrk counted as one line of JSON.
-- wrk … -s post.lua http://host:port -- users.txt [the Host header]

local requests, at = {}, 0

function init(args)
   for user in io.lines(args[1]) do
      local headers = { ["Content-Type"] = "application/json" }
      if args[2] and args[2] ~= "" then headers["Host"] = args[2] end
      requests[#requests + 1] = wrk.format("POST", "/predict", headers, '{"user_id":"' .. user .. '"}')
   end
   at = math.random(#requests)
end

function request()
   at = at % #requests + 1
   return requests[at]
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      '\n{"requests":%d,"seconds":%.6f,"p50_ms":%.4f,"p90_ms":%.4f,"p99_ms":%.4f,"p999_ms":%.4f,"max_ms":%.4f,' ..
      '"errors":{"non_2xx":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d}}\n',
      summary.requests, summary.duration / 1e6,
      latency:percentile(50) / 1e3, latency:percentile(90) / 1e3, latency:percentile(99) / 1e3,
      latency:percentile(99.9) / 1e3, latency.max / 1e3,
      errors.status, errors.connect, errors.read, errors.write, errors.timeout))
end
