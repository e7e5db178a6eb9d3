// Browsers refuse web workers to pages that are opened from a disk. The search of this site runs in one, so there it
// runs in a hidden frame instead. The theme looks for a script of this name before it takes one from the network.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = "<!doctype html>"
      this.ready = new Promise(resolve => this.frame.addEventListener("load", resolve, { once: true }))
        .then(() => this.prepare(url))
      document.body.append(this.frame)
    }

    // Gives the frame what a worker has, and runs the script in it.
    prepare(url) {
      const inside = this.frame.contentWindow
      const load = source => new Promise((resolve, reject) => {
        const script = inside.document.createElement("script")
        script.src = source
        script.addEventListener("load", resolve)
        script.addEventListener("error", () => reject(new Error(`cannot load ${source}`)))
        inside.document.body.append(script)
      })
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.importScripts = (...sources) =>
        sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve())
      return load(url)
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
