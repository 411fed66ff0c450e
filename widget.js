/*! chat_session widget, MIT licence: <script src="/chat/widget.js" defer></script> */
/**
 * Attributes of the tag: data-endpoint (if the file is not served by the plugin), data-title, data-position (right, left),
 * data-accent, data-theme (auto, light, dark), data-open, data-fallback-url, and data-text-NAME for each of TEXTS.
 *
 * @typedef {{ id: string, text: string, node: HTMLElement, body: HTMLElement, note: HTMLElement, drawn: string[],
 *   open?: boolean, link?: number, reply?: Bubble, asked?: Bubble, whole?: boolean }} Bubble
 */
(() => {
  "use strict"
  const page = /** @type {any} */ (window)
  if (page.ChatSession) return

  const RETRY_MIN = 500
  const RETRY_MAX = 20_000
  const HELD = 10_000 // After this long the waits are short again.
  const SLACK = 15_000 // Silence beyond the ping interval.
  const PATIENCE = 3 // Failures in a row that are just "Reconnecting".
  const TYPED_STAYS = 10
  const NEAR = 40
  const TAG = "chat-session"
  const FRAME = 16 // A timer, since hidden pages get no animation frames.
  let limits = { pingInterval: 25, maxMessageChars: 4_000, maxPending: 4 }

  const script = /** @type {HTMLScriptElement} */ (
    document.currentScript ?? document.querySelector('script[src*="/widget.js"]'))
  const { endpoint = ".", title = "Chat", position = "", theme = "", accent = "", fallbackUrl = "" } = script.dataset
  const base = new URL(endpoint, script.src).href.replace(/\/$/, "")

  // ---- Texts ----

  /** @type {Record<string, string>} */
  const TEXTS = {
    launcher: "Open chat",
    close: "Close chat",
    placeholder: "Type a message",
    send: "Send",
    stop: "Stop",
    cancel: "Take back",
    waiting: "Waiting",
    reconnecting: "Reconnecting",
    copy: "Copy transcript",
    idle: "Still there? This chat closes soon.",
    stay: "Stay",
    ended: "This chat has ended. Write to start a new one.",
    busy: "We are busy right now. Please try again soon.",
    failed: "Something went wrong. Please try again.",
    unreachable: "The chat cannot be reached right now.",
    fallback: "Contact us another way",
    newer: "New words below",
    unread: "New reply",
  }
  for (const name in TEXTS) TEXTS[name] = script.getAttribute(`data-text-${name}`) ?? TEXTS[name]

  // ---- Helpers ----

  /** @template {keyof HTMLElementTagNameMap} T  @param {T} tag  @param {Record<string, string>} attributes  @param {(Node | string)[]} children */
  const el = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag)
    for (const name in attributes) node.setAttribute(name, attributes[name])
    node.append(...children)
    return node
  }

  /** @param {string} name  @param {() => void} act  @param {string} [path] */
  const button = (name, act, path) => {
    const label = TEXTS[name]
    const node = el("button", { part: name, "aria-label": label }, path ? "" : label)
    node.onclick = act
    if (path) {
      const [svg, line] = ["svg", "path"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag))
      svg.setAttribute("viewBox", "0 0 24 24")
      line.setAttribute("d", path)
      svg.append(line)
      node.append(svg)
      node.title = label
    }
    return node
  }

  /** A link, or a plain span where a link may not go. */
  const anchor = (address = "", text = "") => {
    try {
      const { href, protocol } = new URL(address, address[0] === "/" ? document.baseURI : undefined)
      if (/^(https?|mailto|tel):$/.test(protocol)) {
        return el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow ugc" }, text)
      }
    } catch {}
    return el("span", {}, text)
  }

  const emit = (name = "", detail = {}) => dispatchEvent(new CustomEvent(`${TAG}:${name}`, { detail }))

  // ---- Markdown ----
  // No pattern runs past the next mark of its kind: the time stays linear.

  const INLINE = new RegExp([
    /\\(?<mark>[!-/:-@[-`{-~])/,
    /(?<!`)(?<t>`+)(?<code>[^`]+)\k<t>(?!`)/,
    /!?\[(?<words>[^[\]]*)\]\((?<address>[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)\)/,
    /(?<bare>https?:\/\/[^\s<>"`]*[^\s<>"`.,:;!?')\]*_])/,
    /(?<b>\*\*|__)(?=\S)(?<strong>(?:(?!\k<b>)[^])+\*?)\k<b>(?!\*)/,
    /(?<![\w*])(?<i>[*_])(?!\s)(?<em>(?:(?!\k<i>)[^])+)\k<i>(?!\w)/,
  ].map((pattern) => pattern.source).join("|"), "g")
  const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+/

  /** @template {Element} T  @param {T} parent */
  const inline = (parent, text = "") => {
    let at = 0
    for (const match of text.matchAll(INLINE)) {
      const { mark, code, words, address, bare, strong, em } = match.groups ?? {}
      parent.append(text.slice(at, match.index))
      at = match.index + match[0].length
      parent.append(
        mark ?? (code ? el("code", {}, code)
          : address ? inline(anchor(address), words || address)
          : bare ? (parent.closest("a") ? bare : anchor(bare, bare))
          : strong ? inline(el("strong"), strong)
          : em ? inline(el("em"), em)
          : match[0]))
    }
    parent.append(text.slice(at))
    return parent
  }

  const blocksOf = (text = "") => {
    /** @type {{ kind: string, lines: string[] }[]} */
    const blocks = []
    let open = false // The last block takes more lines.
    for (const line of text.split("\n")) {
      const last = blocks[blocks.length - 1]
      const kind = /^\s*```[^`]*$/.test(line) ? "pre" : ITEM.test(line) ? "list" : "p"
      if (open && last.kind === "pre") {
        open = kind !== "pre"
        if (open) last.lines.push(line)
      } else if (open && line.trim() && (kind === "p" || kind === last.kind)) {
        last.lines.push(line)
      } else if ((open = line.trim() !== "")) {
        blocks.push({ kind, lines: kind === "pre" ? [] : [line] })
      }
    }
    return blocks
  }

  /** @param {{ kind: string, lines: string[] }} block  @returns {Element} */
  const build = ({ kind, lines }) => {
    if (kind === "pre") return el("pre", {}, lines.join("\n"))
    if (kind === "p") return inline(el("p"), lines.join("\n").replace(/^\s*#+ +\**(.*?)\**$/gm, "**$1**"))
    const [, space, number] = ITEM.exec(lines[0]) ?? []
    /** @type {string[][]} */
    const items = []
    for (const line of lines) {
      const mark = ITEM.exec(line)
      if (mark && mark[1].length <= space.length) items.push([line.slice(mark[0].length)])
      else items[items.length - 1].push(line)
    }
    return el(number ? "ol" : "ul", number ? { start: number } : {}, ...items.map(([first, ...rest]) => {
      const item = inline(el("li"), first)
      item.append(...blocksOf(rest.join("\n")).map(build))
      return item
    }))
  }

  /** Blocks that have not changed keep their nodes. @param {Bubble} reply */
  const draw = ({ body, text, drawn }) => {
    const blocks = blocksOf(text)
    while (body.childNodes.length > blocks.length) body.lastChild?.remove()
    blocks.forEach((block, i) => {
      const source = block.kind + block.lines.join("\n")
      const old = body.childNodes[i]
      if (old && source === drawn[i]) return
      drawn[i] = source
      if (old) old.replaceWith(build(block))
      else body.append(build(block))
    })
  }

  // ---- Connection ----
  // What began under another number of `link` is void.

  const life = new AbortController()
  const { signal } = life
  let link = 0
  /** @type {WebSocket | undefined} */
  let socket
  let wanted = false
  let ended = false
  let live = false // Since `session-start`.
  let previous = ""
  let token = ""
  let opened = 0
  let due = 0 // When the connection counts as dead, or the next may begin.
  let attempts = 0
  let failures = 0
  let refusals = 0
  let timer = 0
  let typedStays = 0
  /** @type {Map<string, Bubble>} */
  const bubbles = new Map()
  /** @type {Bubble | undefined} */
  let running

  const unanswered = () => [...bubbles.values()].filter((bubble) => bubble.open)

  const transmit = (type = "", fields = {}) => {
    if (socket?.readyState === 1) socket.send(JSON.stringify({ type, ...fields }))
  }

  /** Leave at once: the closing handshake may never end. */
  const drop = () => {
    if (running) mark(running, "interrupted")
    if (live && Date.now() - opened >= HELD) attempts = 0
    link += 1
    clearTimeout(timer)
    socket?.close()
    socket = running = undefined
    live = false
    due = 0
    refresh()
  }

  const expectFrame = (silence = SLACK) => {
    clearTimeout(timer)
    due = Date.now() + silence
    timer = setTimeout(failed, silence)
  }

  const connect = async () => {
    drop()
    if (signal.aborted) return
    const mine = link
    wanted = true
    ended = false
    if (!failures) tell(previous && "reconnecting")
    expectFrame()
    try {
      const body = previous ? new URLSearchParams({ previous }) : null
      const answer = await fetch(`${base}/token`, { method: "POST", body })
      if (mine !== link) return
      if (!answer.ok) return failed(answer.status, answer.headers.get("Retry-After") ?? "")
      token = (await answer.json()).token
      if (mine !== link) return
      socket = new WebSocket(`${base.replace("http", "ws")}/socket`, ["chat-session.v1", `token.${token}`])
      socket.onclose = ({ code }) => mine === link && failed(code)
      socket.onmessage = ({ data }) => {
        if (mine !== link) return
        expectFrame(limits.pingInterval * 1000 + SLACK)
        const frame = JSON.parse(data)
        receive[frame.type]?.(frame)
      }
    } catch {
      if (mine === link) failed()
    }
  }

  /** Act on an HTTP status or a close code, which never means that a session is over. */
  const failed = (code = 0, after = "") => {
    const suspect = unanswered().filter((message) => message.link === link).at(-1)
    if (suspect && [1003, 1008, 1009].includes(code)) refuse(suspect, "failed", TEXTS.failed)
    if (code === 3000 && !refusals++) connect()
    else if ([429, 503, 1013].includes(code)) later("busy", Number(after) * 1000 || Date.parse(after) - Date.now() || 0)
    else if (code === 3000 || (code >= 400 && code < 500)) later("unreachable", Infinity)
    else later(failures < PATIENCE ? "reconnecting" : "unreachable")
  }

  /** Come back after a wait; after an endless one, when the visitor asks. */
  const later = (notice = "", wait = 0) => {
    drop()
    failures += 1
    wanted = wait < Infinity
    due = Date.now() + wait
    const jitter = Math.random() * Math.min(RETRY_MAX - RETRY_MIN, RETRY_MIN * 2 ** attempts++)
    if (wanted) timer = setTimeout(connect, Math.max(wait, 0) + RETRY_MIN + jitter)
    tell(notice)
    if (notice !== "reconnecting") emit("error", { code: notice })
  }

  /** Timers sleep when the page or the machine does, so look at once. */
  const wake = () => {
    if (wanted && !document.hidden && Date.now() >= due) connect()
  }

  /** Send what was not sent here, but no more than may wait. */
  const flush = () => {
    for (const message of live ? unanswered().slice(0, limits.maxPending + 1) : []) {
      const { id, text } = message
      const length = [...text].length
      if (length > limits.maxMessageChars) {
        refuse(message, "too-long", `${TEXTS.failed} (${length} / ${limits.maxMessageChars})`)
      } else if (message.link !== link) {
        message.link = link
        transmit("message", { id, text })
      }
    }
    refresh()
  }

  const settle = (state = "", remark = "") => {
    if (!running) return
    const reply = running
    running = undefined
    mark(reply, state, remark)
    // An interrupted reply is no answer: the message goes again.
    if (reply.asked) reply.asked.open = state === "interrupted"
    draw(reply)
    follow()
    if (remark) announce(remark)
    if (state === "finished" && !reply.whole) {
      reply.whole = true
      announce(reply.body.textContent ?? "")
      emit("message", { id: reply.id, role: "assistant", text: reply.text })
    }
    flush()
  }

  /** @type {Record<string, (frame: any) => void>} */
  const receive = {
    "session-start"(frame) {
      limits = { ...limits, ...frame }
      live = true
      opened = Date.now()
      failures = refusals = 0
      tell("")
      if (!previous) greet(frame.greeting)
      previous = token
      emit("start", { sessionId: frame.sessionId })
      flush()
    },
    ping: () => transmit("pong"),
    start({ messageId, messageMetadata }) {
      const asked = bubbles.get(messageMetadata?.inReplyTo)
      running = bubbles.get(messageId) ?? asked?.reply ?? bubble("reply", asked?.node)
      if (running.id !== messageId) {
        Object.assign(running, { id: messageId, asked, whole: false })
        if (asked) Object.assign(asked, { open: true, reply: running })
      }
      running.text = ""
      mark(running, "streaming")
      running.node.querySelector("[part=sources]")?.remove()
      bubbles.set(messageId, running)
      schedule()
      refresh()
    },
    "text-delta"({ delta }) {
      if (running) running.text += delta
      schedule()
    },
    "source-url"({ url, title }) {
      if (!running) return
      const { node } = running
      const sources = node.querySelector("[part=sources]") ?? node.appendChild(el("div", { part: "sources" }))
      sources.append(anchor(url, title || url))
      follow()
    },
    finish: () => settle("finished"),
    abort: ({ reason }) => settle(reason, "…"),
    error({ errorText }) {
      settle("failed", errorText || TEXTS.failed)
      emit("error", { code: "failed" })
    },
    "message-rejected"({ id, code, detail }) {
      const message = bubbles.get(id)
      if (message) refuse(message, code, detail)
      else if (code !== "cancelled") { // It has left the page already.
        tell("", detail)
        emit("error", { code })
      }
      flush()
    },
    "session-idle": () => tell("idle"),
    "session-end"({ reason }) {
      emit("end", { reason })
      if (reason === "restart") return failed()
      drop()
      wanted = false
      ended = true
      previous = ""
      tell("ended")
      // A message that crossed the idle close is the one that starts a fresh chat.
      if (reason === "idle" && unanswered().length) connect()
    },
  }

  // ---- View ----

  const STYLES = `
:host { all: initial !important; position: fixed !important; z-index: var(--chat-z, 2147483000) !important }
aside {
  --accent: var(--chat-accent, #2b5cd9);
  --bg: var(--chat-bg, light-dark(#fff, #1a1c20));
  --text: var(--chat-text, light-dark(#1c1e21, #eceef1));
  --radius: var(--chat-radius, 16px);
  --soft: color-mix(in srgb, var(--text) 7%, var(--bg));
  --line: color-mix(in srgb, var(--text) 16%, var(--bg));
  --mute: color-mix(in srgb, var(--text) 72%, var(--bg));
  --on: contrast-color(var(--accent));
  color-scheme: light dark; color: var(--text);
  font: 15px/1.45 var(--chat-font, system-ui, sans-serif);
}
@supports not (color: contrast-color(red)) { aside { --on: lch(from var(--accent) calc((49.4 - l) * 999) 0 0) } }
[data-theme=light] { color-scheme: light }
[data-theme=dark] { color-scheme: dark }
* { box-sizing: border-box }
[hidden], small:empty { display: none !important }
button { cursor: pointer }
button, textarea { padding: 8px; background: none; font: inherit; color: inherit; border: 1px solid transparent; border-radius: 12px }
svg { display: block; width: 22px; fill: none; stroke: currentcolor; stroke-width: 2; stroke-linecap: round; stroke-linejoin: round }
[part=launcher], [part=panel], [part=badge] { position: fixed; inset-block-end: 20px; inset-inline-end: 20px }
[data-position=left] > * { left: 20px; right: auto }
[data-position=right] > * { right: 20px; left: auto }
[part=launcher], [part=send], [part~=visitor] { background: var(--accent); color: var(--on) }
[part=launcher] { padding: 14px; border-radius: 50%; box-shadow: 0 4px 16px #0004 }
[part=launcher] svg { width: 26px }
[part=badge] { inset-block-end: 60px; pointer-events: none }
[part=panel] {
  inset-block-end: 88px; display: flex; flex-direction: column; overflow: hidden;
  width: min(var(--chat-width, 380px), 100vw - 40px); height: min(var(--chat-height, 600px), 100dvh - 108px);
  background: var(--bg); border: 1px solid var(--line); border-radius: var(--radius); box-shadow: 0 12px 40px #0003;
}
[part=header] { display: flex; align-items: center; padding: 8px; border-bottom: 1px solid var(--line) }
b { flex: 1; padding: 8px; font-size: 16px }
[part=log] { flex: 1; display: flex; flex-direction: column; gap: 10px; padding: 16px; overflow-y: auto; overscroll-behavior: contain; overflow-wrap: anywhere }
[part=log], [part=input] { outline-offset: -2px }
[part~=message] { max-width: 86%; padding: 8px 13px; border: 1px solid transparent; border-radius: var(--radius) }
[part~=visitor] { align-self: end; border-end-end-radius: 4px; white-space: pre-wrap }
[part~=reply] { align-self: start; white-space: pre-line; border-end-start-radius: 4px; background: var(--soft) }
[data-state=waiting], [data-state=refused] { background: none; border: 1px dashed var(--mute); color: var(--text) }
small { display: flex; gap: 10px; align-items: center; font-size: 13px; color: var(--mute) }
[data-state=refused] small, [data-state=failed] small { color: light-dark(#b3261e, #ff9d94) }
small button, footer a, [part=stay] { padding: 4px 0; color: var(--text); text-decoration: underline }
p, pre, ul, ol { margin: 0 0 8px }
ul, ol { padding-inline-start: 22px }
li > *, div > :last-child { margin-bottom: 0 }
pre, code { padding: 1px 4px; border-radius: 6px; background: var(--line); font: 13px ui-monospace, monospace; white-space: pre-wrap }
a { color: inherit }
[data-state=streaming] > :empty::before { content: "● ● ●"; font-size: 10px; color: var(--mute); animation: breathe 1.2s infinite }
[part=sources] { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 8px; font-size: 13px }
[part=sources] > * { padding: 3px 9px; border: 1px solid var(--line); border-radius: 8px; background: var(--bg) }
footer { position: relative; padding: 10px; border-top: 1px solid var(--line) }
footer > div { display: flex; flex-wrap: wrap; gap: 0 10px; align-items: baseline; font-size: 13px }
[part=notice]:not(:empty) { padding-block-end: 8px }
[part=newer] { position: absolute; top: -36px; left: 50%; translate: -50% }
[part=badge], [part=newer] { padding: 0 8px; border-radius: 12px; background: var(--text); color: var(--bg); font-size: 13px; line-height: 24px }
[part=composer] { gap: 6px; align-items: end; flex-wrap: nowrap }
[part=input] {
  flex: 1; min-width: 0; max-height: 132px; field-sizing: content; resize: none;
  padding: 8px 12px; font-size: 16px; border: 1px solid var(--mute);
}
::placeholder { color: var(--mute); opacity: 1 }
[part=stop] { border-color: var(--mute) }
[aria-live] { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
@keyframes late { from { position: absolute; opacity: 0 } }
@keyframes breathe { 50% { opacity: 0.3 } }
[data-state=waiting] small { animation: late 0s 0.4s backwards }
@media (prefers-reduced-motion) { ::before { animation: none !important } }
@media (max-width: 480px), (max-height: 420px) {
  [part=panel] {
    inset: var(--top, 0) 0 auto; width: auto; height: var(--height, 100dvh); border: 0; border-radius: 0;
    padding-block: env(safe-area-inset-top) env(safe-area-inset-bottom);
  }
  [aria-expanded=true] { visibility: hidden }
}
`

  let pinned = true // The visitor reads along.
  /** @type {Bubble | undefined} */
  let dirty

  const launcher = button("launcher", () => toggle(), "M21 12a8 8 0 0 1-8 8H4l1.5-3.2A8 8 0 1 1 21 12Z")
  const badge = el("span", { part: "badge", "aria-hidden": "true", hidden: "" })
  const log = el("div", { part: "log", role: "region", tabindex: "0", "aria-label": title })
  const heard = el("div", { "aria-live": "polite" })
  const notice = el("span", { part: "notice", role: "status" })
  const stay = button("stay", () => remain())
  const contact = anchor(fallbackUrl, TEXTS.fallback)
  const newer = button("newer", () => toEnd())
  const input = el("textarea", { part: "input", rows: "1", placeholder: TEXTS.placeholder })
  const stop = button("stop", () => {
    transmit("stop", { id: running?.asked?.id })
    input.focus()
  }, "M6 6h12v12H6Z")
  const panel = el("div", { part: "panel", id: "panel", role: "dialog", "aria-label": title, hidden: "" },
    el("div", { part: "header" }, el("b", {}, title),
      button("copy", () => copy(), "M9 9h11v11H9ZM5 15H4V4h11v1"), button("close", () => toggle(false), "M6 6l12 12M18 6 6 18")),
    log,
    el("footer", {}, newer, el("div", {}, notice, stay, contact),
      el("div", { part: "composer" }, input, stop, button("send", () => submit(), "M12 19V5M5 12l7-7 7 7"))))
  const root = el("aside", { "aria-label": title, "data-position": position, "data-theme": theme }, panel, launcher, badge, heard)
  const host = document.createElement(TAG)
  const shadow = host.attachShadow({ mode: "open" })

  /** Hide a control without losing the focus. @param {HTMLElement} node */
  const hide = (node, hidden = true) => {
    if (hidden && node === shadow.activeElement) input.focus()
    node.hidden = hidden
  }

  const tell = (name = "", text = TEXTS[name] ?? "") => {
    if (notice.textContent !== text) notice.textContent = text
    hide(stay, name !== "idle")
    hide(contact, !contact.matches("a") || !/unreachable|busy/.test(name))
  }

  const announce = (text = "") => {
    heard.replaceChildren(panel.hidden ? TEXTS.unread : text)
    count()
  }

  const count = () => {
    badge.hidden = !panel.hidden
    badge.textContent = panel.hidden ? `${Number(badge.textContent) + 1}` : ""
    launcher.title = panel.hidden ? TEXTS.unread : TEXTS.launcher
  }

  const toEnd = () => {
    log.scrollTop = log.scrollHeight
    pinned = true
    hide(newer)
  }

  const follow = () => pinned ? toEnd() : hide(newer, false)

  const schedule = () => {
    if (!dirty) setTimeout(() => {
      if (dirty?.text) draw(dirty)
      dirty = undefined
      follow()
    }, FRAME)
    dirty = running
  }

  /** @returns {Bubble} */
  const bubble = (part = "", before = log.lastElementChild) => {
    const body = el("div", { dir: "auto" })
    const note = el("small")
    const node = el("div", { part: `message ${part}` }, body, note)
    if (before) before.after(node)
    else log.append(node)
    return { id: "", text: "", node, body, note, drawn: [] }
  }

  /** @param {Bubble} bubble  @param {(Node | string)[]} remarks */
  const mark = ({ node, note }, state = "", ...remarks) => {
    if (note.contains(shadow.activeElement)) input.focus()
    node.dataset.state = state
    note.replaceChildren(...remarks)
  }

  /** @param {Bubble} message */
  const takeBackButton = (message) => button("cancel", () => takeBack(message))

  /** Take a message off the page and give its words back. @param {Bubble} message */
  const takeBack = ({ id, text, node }) => {
    transmit("stop", { id })
    bubbles.delete(id)
    node.remove()
    input.value = `${text}\n${input.value}`.trim()
    input.focus()
    flush()
  }

  /** @param {Bubble} message */
  const refuse = (message, code = "", detail = "") => {
    message.open = undefined
    mark(message, "refused", detail, input.value && takeBackButton(message))
    input.value ||= message.text
    announce(detail)
    emit("error", { code })
  }

  const refresh = () => {
    hide(stop, !running)
    for (const message of bubbles.values()) {
      const { node, reply, open } = message
      const state = open && !reply ? "waiting" : "sent"
      if (open === undefined || node.dataset.state === state) continue
      mark(message, state, ...(state === "sent" ? [] : [TEXTS.waiting, takeBackButton(message)]))
    }
  }

  const greet = (text = "") => {
    const greeting = bubble("reply")
    unanswered()[0]?.node.before(greeting.node)
    greeting.text = text
    draw(greeting)
    announce(greeting.body.textContent ?? "")
    follow()
  }

  const say = (text = "") => {
    text = text.trim()
    if (!text) return
    const id = crypto.getRandomValues(new Uint32Array(4)).join("-")
    const message = bubble("visitor")
    message.body.append(text)
    bubbles.set(id, Object.assign(message, { id, text, open: true }))
    emit("message", { id, role: "user", text })
    typedStays = 0
    if (live) tell("")
    if (wanted) flush()
    else connect()
    toEnd()
  }

  const submit = () => {
    const text = input.value
    input.value = ""
    say(text)
    input.focus()
  }

  const remain = () => {
    transmit("stay")
    tell("")
  }

  const copy = () => {
    const turns = /** @type {HTMLElement[]} */ ([...log.children])
    const text = turns.map(({ part, innerText }) => (part.contains("visitor") ? "> " : "") + innerText).join("\n\n")
    const legacy = () => {
      addEventListener("copy", (event) => {
        event.preventDefault()
        event.clipboardData?.setData("text/plain", text)
      }, { once: true })
      document.execCommand("copy")
    }
    navigator.clipboard?.writeText(text).catch(legacy) ?? legacy() // Plain http has no clipboard.
  }

  const toggle = (visible = panel.hidden) => {
    const changed = visible === panel.hidden
    const inside = panel.contains(shadow.activeElement)
    panel.hidden = !visible
    launcher.ariaExpanded = `${visible}`
    if (visible) {
      count()
      follow()
      input.focus()
      if (!wanted && !ended) connect()
    } else if (inside) launcher.focus()
    if (changed) emit(visible ? "open" : "close")
  }

  // ---- Start ----

  const sheet = new CSSStyleSheet()
  sheet.replaceSync(STYLES)
  shadow.adoptedStyleSheets = [sheet]
  shadow.append(root)
  launcher.ariaExpanded = "false"
  launcher.setAttribute("aria-controls", "panel")
  if (CSS.supports("color", accent)) host.style.setProperty("--chat-accent", accent)

  input.oninput = () => {
    if (!stay.hidden && typedStays++ < TYPED_STAYS) remain()
  }
  root.onkeydown = (event) => {
    event.stopPropagation() // Not for the page's own shortcuts.
    if (event.isComposing || event.keyCode === 229) return // An input method is at work.
    if (event.key === "Escape") toggle(false)
    if (event.key === "Enter" && !event.shiftKey && event.target === input) {
      event.preventDefault()
      submit()
    }
  }
  log.onscroll = () => {
    pinned = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR
    if (pinned) hide(newer)
  }
  new ResizeObserver(() => pinned && toEnd()).observe(log)

  const view = /** @type {any} */ (visualViewport)
  const fit = () => { // A phone's keyboard covers the page without resizing it.
    root.style.setProperty("--top", `${view.offsetTop}px`)
    root.style.setProperty("--height", `${view.height * view.scale}px`)
  }
  for (const type of ["resize", "scroll"]) view.addEventListener(type, fit, { signal })
  for (const type of ["online", "pageshow"]) addEventListener(type, wake, { signal })
  document.addEventListener("visibilitychange", wake, { signal })
  addEventListener("pagehide", drop, { signal }) // An open socket bars the back/forward cache.

  customElements.get(TAG) ?? customElements.define(TAG, class extends HTMLElement {})
  const html = document.documentElement
  const attach = () => host.isConnected || html.append(host) // Beside the body, since some pages swap that.
  const keeper = new MutationObserver(attach)
  keeper.observe(html, { childList: true })
  attach()

  page.ChatSession = {
    open: () => toggle(true),
    close: () => toggle(false),
    send: say,
    destroy() {
      transmit("end")
      life.abort()
      drop()
      wanted = false
      keeper.disconnect()
      host.remove()
      delete page.ChatSession
    },
  }
  // A prerendered page gets no frame before its visit.
  if (script.hasAttribute("data-open")) requestAnimationFrame(() => toggle(true))
})()
