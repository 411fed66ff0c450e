/**
 * `useChat` of the AI SDK (`ai` 6 and 7) over the websocket of chat_session. Copy this file into your app.
 *
 * One transport is one chat: a socket opens with the first message, or with `connect()`, and serves all that follow.
 * A lost connection ends the running reply with an error that the SDK calls a disconnect; `resumeStream()` comes back
 * and goes on with that reply.
 *
 * @typedef {import("ai").UIMessage} UIMessage
 * @typedef {import("ai").UIMessageChunk} UIMessageChunk
 * @typedef {import("ai").ChatTransport<UIMessage>} Transport
 * @typedef {ReadableStreamDefaultController<UIMessageChunk>} Controller
 * @typedef {{ id: string, text: string, shown?: string, chunks: ReadableStream<UIMessageChunk>, controller: Controller }} Reply
 */

const PATIENCE = 15_000 // For a connection to open, and for frames beyond the ping interval.
const PAUSES = [0, 1_000, 2_000, 4_000, 8_000, 16_000] // Before each attempt to come back, at most.
const CHUNKS = ["start", "text-start", "text-delta", "text-end", "source-url", "finish", "abort", "error"]
const REFUSED = [1003, 1008, 1009] // Close codes after which the same message would be refused again.
const ENDS = ["finish", "abort", "error"]

// The SDK knows a disconnect by the class of the error and by the word "network".
const lost = (why = "lost") => new TypeError(`The network connection to the chat: ${why}.`)

/** @implements {Transport} */
export class ChatSessionTransport {
  // `useChat({ transport })` loses this with `ai` 6, and a resumed reply is doubled: use `useChat({ chat })`.
  resumeStreamIsReplay = true
  /** @type {Map<string, Reply>} By the id of the message: what has not ended. */
  #replies = new Map()
  /** @type {Reply | undefined} What `reconnectToStream` goes on with; it may have ended since. */
  #lost
  /** @type {Promise<void> | undefined} */
  #link
  /** @type {WebSocket | undefined} Since `session-start`. */
  #socket
  #previous = ""
  #running = ""

  /** @param {{ endpoint?: string, onSession?: (frame: any) => void }} options  `onSession` gets the `session-` frames. */
  constructor({ endpoint = "/chat", onSession = () => {} } = {}) {
    this.endpoint = endpoint
    this.onSession = onSession
  }

  /** @param {Parameters<Transport["sendMessages"]>[0]} options */
  async sendMessages({ trigger, messages, abortSignal }) {
    if (trigger === "regenerate-message" && this.#lost) this.#quit(this.#lost)
    this.#lost = undefined
    const asked = messages.filter(({ role }) => role === "user").at(-1)
    const text = asked?.parts.map((part) => (part.type === "text" ? part.text : "")).join("") ?? ""
    // An id is answered once, and the SDK asks again under the old one.
    const id = crypto.getRandomValues(new Uint32Array(4)).join("-")
    const reply = { id, text, ...this.#open(id) }
    this.#replies.set(id, reply)
    this.#transmit("message", { id, text })
    this.connect().catch(() => {}) // The stream has the error.
    return this.#heed(reply, abortSignal)
  }

  /** @param {{ abortSignal?: AbortSignal }} options */
  async reconnectToStream({ abortSignal }) {
    const reply = this.#lost
    for (let attempt = 0; reply; attempt += 1) {
      await new Promise((resolve) => setTimeout(resolve, PAUSES[attempt] * Math.random()))
      try {
        await this.connect()
        abortSignal?.throwIfAborted()
        this.#lost = undefined
        return this.#heed(reply, abortSignal)
      } catch (error) {
        if (!(error instanceof TypeError) || attempt === PAUSES.length - 1) throw error
      }
    }
    return null
  }

  /** Open the chat, and be greeted, before there is a message. */
  connect() {
    return (this.#link ??= this.#dial().catch((error) => {
      this.#drop(error)
      throw error
    }))
  }

  /** Answer `session-idle`. */
  stay() {
    this.#transmit("stay")
  }

  /** End the chat. */
  close() {
    this.#transmit("end")
  }

  async #dial() {
    const base = new URL(this.endpoint, globalThis.location?.href).href
    const body = this.#previous ? new URLSearchParams({ previous: this.#previous }) : null
    const asked = fetch(`${base}/token`, { method: "POST", body, signal: AbortSignal.timeout(PATIENCE) })
    const answer = await asked.catch(({ message }) => Promise.reject(lost(message)))
    if (answer.status === 429 || answer.status >= 500) throw lost(`busy (${answer.status})`)
    if (!answer.ok) throw new Error(`The chat was refused (${answer.status}).`)
    const { token } = await answer.json()
    const socket = new WebSocket(`${base.replace("http", "ws")}/socket`, ["chat-session.v1", `token.${token}`])
    await new Promise((resolve, reject) => {
      /** @param {Error} error */
      const end = (error) => {
        clearTimeout(timer)
        socket.onmessage = socket.onclose = null
        socket.close() // The closing handshake of a dead link may never end.
        if (this.#socket === socket) this.#drop(error)
        else reject(error)
      }
      let timer = setTimeout(end, PATIENCE, lost("silent"))
      let silence = PATIENCE
      socket.onclose = ({ code }) =>
        end(REFUSED.includes(code) ? new Error(`The message was refused (${code}).`) : lost(`closed (${code})`))
      socket.onmessage = ({ data }) => {
        const frame = JSON.parse(data)
        if (frame.type === "session-start") {
          silence += frame.pingInterval * 1_000
          this.#socket = socket
          this.#previous = token
          this.#replies.forEach(({ id, text }) => this.#transmit("message", { id, text }))
          resolve(undefined)
        }
        clearTimeout(timer)
        timer = setTimeout(end, silence, lost("silent"))
        this.#receive(frame)
      }
    })
  }

  /** @param {any} frame */
  #receive(frame) {
    const { type, id, reason } = frame
    if (type === "ping") this.#transmit("pong")
    if (type === "message-rejected") this.#fail(id, Object.assign(new Error(frame.detail), frame))
    if (type.startsWith("session-")) this.onSession(frame)
    if (type === "session-end") this.#end(reason)
    if (type === "start") this.#running = frame.messageMetadata.inReplyTo
    const reply = this.#replies.get(this.#running)
    if (!reply || !CHUNKS.includes(type)) return
    // A reply to a message that was asked again takes the place of the one that was cut short.
    if (type === "start") frame.messageId = reply.shown ??= frame.messageId
    if (type === "abort" && reason === "interrupted") return this.#lose(reply, lost("interrupted"))
    reply.controller.enqueue(frame)
    if (!ENDS.includes(type)) return
    reply.controller.close()
    // Without the stop, a failed reply that was carried over would be answered anew.
    if (type === "error") this.#stop(reply.id)
    else this.#replies.delete(reply.id)
  }

  /** @param {string} id */
  #open(id) {
    /** @type {any} */
    let controller
    const chunks = new ReadableStream({ start: (it) => void (controller = it), cancel: () => void this.#stop(id) })
    return { chunks, controller }
  }

  /** End the stream, and have another ready for `reconnectToStream`. @param {Reply} reply  @param {Error} error */
  #lose(reply, error) {
    reply.controller.error(error)
    this.#lost = Object.assign(reply, this.#open(reply.id))
  }

  /** @param {string} id  @param {Error} error */
  #fail(id, error) {
    const reply = this.#replies.get(id)
    this.#replies.delete(id)
    reply?.controller.error(error)
  }

  /** What is sent from now on needs another connection, though this one may not have closed yet. @param {string} reason */
  #end(reason) {
    if (reason === "restart") return this.#drop(lost("the server restarts"))
    this.#previous = ""
    this.#drop(new Error(`The chat has ended (${reason}).`))
  }

  /** The connection is no more. @param {Error} error */
  #drop(error) {
    this.#link = this.#socket = undefined
    this.#running = ""
    for (const reply of this.#replies.values()) {
      if (error instanceof TypeError) this.#lose(reply, error)
      else this.#fail(reply.id, error)
    }
  }

  /** Stop the reply on the signal, unless this stream of it is lost by then. @param {Reply} reply  @param {AbortSignal} [signal] */
  #heed(reply, signal) {
    const { chunks } = reply
    signal?.addEventListener("abort", () => reply.chunks === chunks && this.#quit(reply))
    return chunks
  }

  /** @param {Reply} reply */
  #quit({ id, controller }) {
    if (!this.#stop(id)) return
    controller.enqueue({ type: "abort", reason: "stopped" })
    controller.close()
  }

  #stop(id = "") {
    const isOpen = this.#replies.delete(id)
    if (isOpen) this.#transmit("stop", { id })
    return isOpen
  }

  /** @param {string} type  @param {object} fields */
  #transmit(type, fields = {}) {
    if (this.#socket?.readyState === 1) this.#socket.send(JSON.stringify({ type, ...fields }))
  }
}
