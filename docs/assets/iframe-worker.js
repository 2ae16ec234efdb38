// Browsers refuse to start a worker of a page that was opened as a file. The search of the site then runs in a hidden frame.
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(address) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow, script = inside.document.createElement("script")
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.importScripts = async (...addresses) => {
        for (const address of addresses) await this.load(address)
      }
      this.ready = new Promise(resolve => { script.onload = resolve })
      script.src = new URL(address, document.baseURI)
      inside.document.body.append(script)
    }
    load(address) {
      const document = this.frame.contentWindow.document, script = document.createElement("script")
      script.src = address
      return new Promise(resolve => {
        script.onload = resolve
        document.body.append(script)
      })
    }
    async postMessage(data) {
      await this.ready
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
    }
    terminate() { this.frame.remove() }
  }
  window.IFrameWorker = window.Worker = IFrameWorker
}
